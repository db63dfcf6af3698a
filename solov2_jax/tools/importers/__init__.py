"""Other annotation formats -> COCO instances json."""
