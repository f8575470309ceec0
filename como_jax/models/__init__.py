"""Model families; parameters only, sharding and randomness come from outside."""
