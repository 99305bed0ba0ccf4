"""`python -m loraplex`: the same as the `loraplex` command."""

from .cli import main

if __name__ == "__main__":
    main()
