"""Speed and memory beside the reference, in the same conditions."""
