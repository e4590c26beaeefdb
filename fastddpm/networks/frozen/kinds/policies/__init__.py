"""The networks of diffusion policies for robots, frozen: their properties (`blueprint`) and their layers (`lowering`)."""
