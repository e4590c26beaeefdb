"""The diffusion process: schedules, timesteps, and the coefficient table of every sampler."""
