"""Single images to labels, in this process, by the pipeline's own stages; archives are `engine score`'s business."""
