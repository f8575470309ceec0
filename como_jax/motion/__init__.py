"""Latent motion models: CoMo and its variants, LAQ, and the masked autoencoder of their encoder."""
