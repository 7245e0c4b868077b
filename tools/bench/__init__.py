"""`tensorgraph bench`: tokens a second, beside a peer in alternating rounds, and beside what the machine can do."""
