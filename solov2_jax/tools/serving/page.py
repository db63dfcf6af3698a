"""The page at `/`: an image in, the drawn answer out; nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SOLOv2</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100%; border-radius: 4px } label { margin-right: 1rem }
code, pre { background: #f3f3f3; padding: 0 .25rem } pre { padding: .75rem }
#note { min-height: 1.5rem; color: #a00 }
</style></head><body>
<h1>SOLOv2 instance segmentation</h1>
<p><label>Image <input type="file" id="file" accept="image/*"></label>
<label>Least score <input type="number" id="score" value="0.3" min="0" max="1"
step="0.05"></label></p>
<p id="note" role="status"></p><p><img id="answer" alt=""></p>
<p>From a shell:</p>
<pre>curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg \\
    'http://localhost:8000/predict?score=0.3'</pre>
<p><a href="docs">Interface</a> · <a href="openapi.json">OpenAPI</a> ·
<a href="healthz">health</a> · <a href="metrics">metrics</a></p>
<script>
const at = id => document.getElementById(id);
async function send() {
  const file = at('file').files[0];
  if (!file) return;
  at('note').textContent = 'computing ...';
  const start = performance.now();
  const answer = await fetch('predict?output=png&score=' + at('score').value,
    { method: 'POST', body: file, headers: { 'Content-Type': file.type } });
  if (!answer.ok) {
    const text = await answer.json();
    at('note').textContent = text.error || JSON.stringify(text.detail);
    return;
  }
  at('note').textContent = Math.round(performance.now() - start) + ' ms';
  at('answer').src = URL.createObjectURL(await answer.blob());
  at('answer').alt = 'the image with the objects that were found';
}
at('file').onchange = at('score').onchange = send;
</script></body></html>
"""
