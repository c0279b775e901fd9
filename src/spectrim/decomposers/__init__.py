"""A dense layer to its spectrum, from which any rank is cut."""
