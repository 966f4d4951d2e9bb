"""What is timed beside what: variants in turn, in one run, so that a busy machine slows all of them alike."""
