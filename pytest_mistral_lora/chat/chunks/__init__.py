"""The types of chunks of a content: one module a type, with the object that answers what the package asks about it."""
