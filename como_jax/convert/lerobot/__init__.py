"""LeRobot datasets: Parquet tables and videos, in the formats v2.0, v2.1 and v3.0."""
