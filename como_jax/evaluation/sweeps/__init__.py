"""Many runs of one question: cells and the table of them."""
