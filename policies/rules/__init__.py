"""Published systems' rules, one file each; each ends in RULE."""
