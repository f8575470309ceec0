"""Labelled datasets in the formats of other projects."""
