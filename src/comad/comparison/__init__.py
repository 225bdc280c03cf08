"""Methods, teacher sets and seeds side by side, on one data set."""
