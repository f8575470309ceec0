"""What leaves the project: models for PyTorch, labelled datasets in other formats."""
