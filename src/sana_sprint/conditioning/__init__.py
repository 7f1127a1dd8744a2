"""A picture or a drawing to what a ControlNet is shown of it: edges, soft edges, scribble, depth."""
