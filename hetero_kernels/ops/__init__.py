"""The operators: schema, fake, autograd and autocast of each, and the choice of the backend. Nothing numerical."""
