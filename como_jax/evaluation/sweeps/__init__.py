"""Many runs for one question: the cells of a sweep, their tables, and the policy bench."""
