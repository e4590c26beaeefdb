"""The U-Nets of EDM and PhysicsNeMo, frozen: DDPM++ and NCSN++ (`SongUNet`) and ADM (`DhariwalUNet`)."""
