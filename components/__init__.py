"""The steps of the flywheel, one folder each, in the order that README.md gives."""
