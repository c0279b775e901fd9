"""A dense layer to its spectrum, which holds the factors of every rank."""
