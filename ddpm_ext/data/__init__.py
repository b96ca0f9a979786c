"""Images from data sets and folders."""
