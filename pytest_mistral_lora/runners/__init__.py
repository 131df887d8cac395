"""What other trainers would feed a model: ids and labels, taken out of their own code in their own environments."""
