"""Placeholder until the real one is merged: AP at IoU 0.5."""
from typing import Any
import numpy as np
from fasttune_detection.boxes import read_objects

class BoxMeter:
    def __init__(self, box_format=None):
        self.box_format=box_format; self.rows=[]; self.truth=0
    def update(self, prediction, reference):
        o=read_objects(reference["objects"], self.box_format, None)
        self.truth+=len(o); used=set()
        for b,l,s in zip(prediction["boxes"],prediction["labels"],prediction["scores"]):
            best,at=0.5,None
            for j,(t,name) in enumerate(zip(o.boxes.tolist(),o.labels)):
                if j in used or name!=l: continue
                w=max(0,min(b[2],t[2])-max(b[0],t[0])); h=max(0,min(b[3],t[3])-max(b[1],t[1])); i=w*h
                u=(b[2]-b[0])*(b[3]-b[1])+(t[2]-t[0])*(t[3]-t[1])-i
                if u>0 and i/u>=best: best,at=i/u,j
            if at is not None: used.add(at)
            self.rows.append((s,at is not None))
    def merge(self, other): self.rows+=other.rows; self.truth+=other.truth
    def result(self) -> dict[str, Any]:
        hits=np.array([hit for _,hit in sorted(self.rows,key=lambda r:-r[0])],dtype=float)
        tp=np.cumsum(hits); p=tp/np.arange(1,len(tp)+1) if len(tp) else tp
        ap=float((p*hits).sum()/self.truth) if self.truth else 0.0
        return {"mAP":ap,"mAP50":ap,"mAP75":ap}
