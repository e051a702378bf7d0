"""Where tokens, layers and attention are inside one model family; one file per family."""
