"""`tensorgraph synth`: files with random weights in any published shape."""
