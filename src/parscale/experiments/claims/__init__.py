"""One file per claim: what it says, what to train for it, and what the rows say of it."""
