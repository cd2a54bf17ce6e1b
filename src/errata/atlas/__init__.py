"""atlas: the small model that comes with errata, its world, and how it was made."""
