"""rlhf_min: reward models, REINFORCE and WARP from scratch, to read in two evenings and to run on a laptop."""
