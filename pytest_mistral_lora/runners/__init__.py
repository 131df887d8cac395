"""The ids and labels that other trainers would feed a model, made by their own code in their own environments."""
