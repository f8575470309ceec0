"""What training in JAX and the robot's PyTorch runtime share; needs NumPy, OpenCV and no JAX."""
