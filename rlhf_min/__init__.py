"""rlhf_min: reward models, REINFORCE and WARP from scratch, to read in an evening and to run on a laptop."""
