# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The page to speak with the model, itself a client of the realtime endpoint."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


router = APIRouter()
PAGE = Path(__file__).with_name("page.html")
# All that the page needs is in it, and it talks to nobody else.
POLICY = "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; connect-src 'self'; "
POLICY += "img-src data:; media-src blob:; worker-src blob:"


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})
