"""Other annotation formats -> COCO instances json; `python -m` runs `__main__`."""
