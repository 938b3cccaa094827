// An instrumented app: node send_spans.js GATEWAY RESPONSE_ID. Says three things about an answer, each in its own way.

import { ROOT_CONTEXT, trace } from "@opentelemetry/api";
import { OTLPTraceExporter } from "@opentelemetry/exporter-trace-otlp-http";
import { BasicTracerProvider, SimpleSpanProcessor } from "@opentelemetry/sdk-trace-base";

const [gateway, responseId] = process.argv.slice(2);
const exporter = new OTLPTraceExporter({ url: `${gateway}/v1/traces` });
const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] });
const tracer = provider.getTracer("an app");

const span = tracer.startSpan("handle a message", {}, ROOT_CONTEXT);
const { traceId, spanId } = span.spanContext();
const said = await fetch(`${gateway}/v1/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json", traceparent: `00-${traceId}-${spanId}-01` },
  body: JSON.stringify({ model: "assistant", messages: [{ role: "user", content: "from node" }] }),
});
const { id } = await said.json();
while (!(await fetch(`${gateway}/v1/feedback/${id}`)).ok); // until it is journaled

const inside = trace.setSpan(ROOT_CONTEXT, span);
tracer.startSpan("copied", { attributes: { "understudy.signal.kind": "copy" } }, inside).end();
span.end();
tracer
  .startSpan("voted", {
    attributes: {
      "understudy.signal.kind": "thumb",
      "understudy.signal.value": true,
      "gen_ai.response.id": responseId,
      "user.id": "ann",
    },
  })
  .end();
const judged = tracer.startSpan("judged", { attributes: { "gen_ai.response.id": id } });
judged.addEvent("gen_ai.evaluation.result", { "gen_ai.evaluation.name": "relevance", "gen_ai.evaluation.score.value": 1 });
judged.end();
await provider.forceFlush();
await provider.shutdown();
