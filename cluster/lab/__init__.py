"""`reprise lab`: experiments with policies on traces, from the command line."""
