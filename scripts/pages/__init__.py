"""What writes the repository's own pages: method pages, speed, dense results, and the floors in model cards."""
