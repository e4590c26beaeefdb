"""The networks of robots' diffusion policies, frozen: their properties (`blueprint`) and their layers (`lowering`)."""
