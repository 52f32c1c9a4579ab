"""``python -m tinybert_fast.cli`` is ``tinybert-fast``."""

from tinybert_fast.cli.main import main

if __name__ == "__main__":
    main()
