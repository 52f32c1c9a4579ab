"""``python -m tinybert_fast.cli`` and ``torchrun -m tinybert_fast.cli`` are ``tinybert-fast``."""

from tinybert_fast.cli.main import main

if __name__ == "__main__":
    main()
