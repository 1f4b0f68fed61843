"""RULER (arXiv 2404.06654): thirteen tasks on texts of any length, prepared, run and scored."""
