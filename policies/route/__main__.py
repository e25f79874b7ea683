"""``python -m policies.route``."""

from policies.route.command import main

if __name__ == "__main__":
    main()
