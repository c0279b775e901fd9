"""Other papers' selectors, in our words: each says what is the paper's, what is our reading and what is left out."""
