"""What two or more rooms need: storage, datasets, detections, tracking. Never imports kfp."""
