"""A small world of coloured shapes: requests, scenes, captions, pictures, and a judge that looks only at pixels."""
