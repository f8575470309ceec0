"""Labels any dataset with latent motion, each frame decoded and encoded once."""
