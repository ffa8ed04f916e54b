"""A student in the forms that serving engines know: exported, proven, described."""
