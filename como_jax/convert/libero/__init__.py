"""LIBERO demonstrations, as the HDF5 files that are published."""
