{{/*
What the schema cannot see, because it is about values together. Each line names the value and the
fix. All of them are told at once.
*/}}

{{- define "arbitrage.check" -}}
{{- $problems := list -}}
{{- $components := fromYaml (include "arbitrage.components" .) -}}
{{- range $name, $c := $components -}}
{{- $problems = concat $problems (fromYamlArray (include "arbitrage.componentProblems" (dict "root" $ "c" $c "components" $components))) -}}
{{- end -}}
{{- $problems = concat $problems (fromYamlArray (include "arbitrage.releaseProblems" (dict "root" . "components" $components))) -}}
{{- if $problems -}}
{{- fail (printf "values that cannot be used:\n  - %s" (join "\n  - " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "arbitrage.componentProblems" -}}
{{- $c := .c -}}
{{- $name := $c.name -}}
{{- $scale := $c.autoscaling -}}
{{- $isPlural := eq (include "arbitrage.isPlural" $c) "true" -}}
{{- if and (has $name (list "orchestrator" "draft" "target")) (not $c.enabled) }}
- {{ printf "%s.enabled: is false, but no request goes without it; set %s.enabled=true%s" $name $name (ternary ", or give the address of one that runs elsewhere" "" $c.isModel) | quote }}
{{- end }}
{{- if and (not $c.isModel) $c.address }}
- {{ printf "%s.address: is %q, but nothing here would call it; leave it out" $name $c.address | quote }}
{{- end }}
{{- $needed := add $c.drain.preStopSeconds $c.drain.graceSeconds 5 }}
{{- if lt (int $c.drain.terminationGracePeriodSeconds) (int $needed) }}
- {{ printf "%s.drain.terminationGracePeriodSeconds: is %d, and the pod would be killed while calls run; set it to at least %d (preStopSeconds %d + graceSeconds %d + 5)" $name (int $c.drain.terminationGracePeriodSeconds) (int $needed) (int $c.drain.preStopSeconds) (int $c.drain.graceSeconds) | quote }}
{{- end }}
{{- if and (eq (toString $c.strategy.maxSurge) "0") (eq (toString $c.strategy.maxUnavailable) "0") }}
- {{ printf "%s.strategy: maxSurge and maxUnavailable are both 0, so no new version ever comes in; set one of them to 1" $name | quote }}
{{- end }}
{{- if eq (int $c.service.port) (int $c.service.metricsPort) }}
- {{ printf "%s.service.metricsPort: is %d as service.port is; give them different ports" $name (int $c.service.port) | quote }}
{{- end }}
{{- if gt (int $scale.minReplicas) (int $scale.maxReplicas) }}
- {{ printf "%s.autoscaling.minReplicas: is %d, more than maxReplicas, %d; lower it or raise maxReplicas" $name (int $scale.minReplicas) (int $scale.maxReplicas) | quote }}
{{- end }}
{{- if ne $scale.mode "none" }}
{{- if and (eq (int $scale.minReplicas) 0) (ne $scale.mode "keda") }}
- {{ printf "%s.autoscaling.minReplicas: is 0, which an HPA cannot do; set it to 1, or take mode keda" $name | quote }}
{{- end }}
{{- if and (eq (int $scale.minReplicas) 0) (eq $name "draft") }}
- "draft.autoscaling.minReplicas: is 0, but every policy save target_only begins with a draft; set it to at least 1"
{{- end }}
{{- if and (eq (int $scale.minReplicas) 0) (not $c.isModel) }}
- {{ printf "%s.autoscaling.minReplicas: is 0, but without it nobody is told what is wanted; set it to at least 1" $name | quote }}
{{- end }}
{{- if ne $c.kind "Deployment" }}
- {{ printf "%s.autoscaling.mode: is %s, but a %s is scaled by KServe; set mode none, or kind Deployment" $name $scale.mode $c.kind | quote }}
{{- end }}
{{- if and (eq $scale.mode "keda") (not $scale.keda.serverAddress) }}
- {{ printf "%s.autoscaling.keda.serverAddress: is empty, so there is nothing to scale by; give the URL of Prometheus, such as http://prometheus-operated.monitoring.svc:9090" $name | quote }}
{{- end }}
{{- if and (eq $scale.mode "keda") $scale.keda.authModes (not $scale.keda.authenticationRef) }}
- {{ printf "%s.autoscaling.keda.authModes: is %s, but authenticationRef is empty, so there are no credentials; name the TriggerAuthentication" $name $scale.keda.authModes | quote }}
{{- end }}
{{- if and (eq $scale.mode "hpa") (eq $scale.hpa.metricType "Pods") (not $scale.hpa.metricName) }}
- {{ printf "%s.autoscaling.hpa.metricName: is empty; metricType Pods needs the name of a metric of its pods" $name | quote }}
{{- end }}
{{- if not $c.isDeployed }}
- {{ printf "%s.autoscaling.mode: is %s, but no %s is deployed here; set mode none" $name $scale.mode $name | quote }}
{{- end }}
{{- end }}
{{- $bare := deepCopy $c }}
{{- $_ := set $bare "settings" dict }}
{{- $_ := set $bare "extraEnv" list }}
{{- $given := list }}
{{- range fromYamlArray (include "arbitrage.environment" (dict "root" .root "c" $bare "components" .components)) }}{{ $given = append $given .name }}{{ end }}
{{- /* A setting goes before the device that a GPU stands for. */}}
{{- $given = without $given "ARBITRAGE_DEVICE" }}
{{- range $setting, $_ := $c.settings }}
{{- if or (has (printf "ARBITRAGE_%s" $setting) $given) (has $setting (list "HOST" "PORT" "METRICS_PORT" "SHUTDOWN_GRACE_S" "LOG_LEVEL" "LOG_FORMAT" "ROLE" "MODEL" "MODEL_ID" "ENGINE" "ENGINE_URL" "DRAFT_ADDRESS" "TARGET_ADDRESS" "PRM_ADDRESS" "ROUTER_ADDRESS" "ORCHESTRATOR_ADDRESS" "STORE_URL" "API_KEYS_FILE" "TLS_CERTIFICATE" "TLS_KEY")) }}
- {{ printf "%s.settings.%s: ARBITRAGE_%s is made by the chart of other values; set those instead (docs/deploy.md)" $name $setting $setting | quote }}
{{- end }}
{{- end }}
{{- include "arbitrage.labelProblems" (dict "place" (printf "%s.podLabels" $name) "labels" $c.podLabels) }}
{{- if $c.isDeployed }}
{{- include "arbitrage.resourceProblems" (dict "place" (printf "%s.resources" $name) "resources" $c.resources) }}
{{- end }}
{{- range $entry := $c.extraEnv }}
{{- if hasPrefix "ARBITRAGE_" $entry.name }}
- {{ printf "%s.extraEnv: %s belongs in %s.settings, as %s" $name $entry.name $name (trimPrefix "ARBITRAGE_" $entry.name) | quote }}
{{- end }}
{{- end }}
{{- range $entry := $c.extraEnv }}
{{- if has $entry.name $given }}
- {{ printf "%s.extraEnv: %s is given by the chart already, and would be there twice; leave it out" $name $entry.name | quote }}
{{- end }}
{{- end }}
{{- if $c.isModel }}
{{- include "arbitrage.modelProblems" (dict "root" .root "c" $c "isPlural" $isPlural) }}
{{- else }}
{{- if or (ne $c.engine.mode "inProcess") (ne $c.modelCache.mode "none") (gt (int $c.gpu.count) 0) (ne $c.kind "Deployment") }}
- {{ printf "%s: runs no model, so engine, modelCache, gpu and kind are not for it; leave them out" $name | quote }}
{{- end }}
{{- end }}
{{- $tls := .root.Values.tls }}
{{- if and $tls.enabled $c.isDeployed (not $tls.certManager.enabled) (not (index $tls.secrets $name)) }}
- {{ printf "tls.secrets.%s: is empty, but tls.enabled is true; name the Secret with tls.crt, tls.key and ca.crt of the %s, or set tls.certManager.enabled=true" $name $name | quote }}
{{- end }}
{{- end -}}

{{/* Labels that the chart gives itself, and selects pods by. Takes place and labels. */}}
{{- define "arbitrage.labelProblems" -}}
{{- range $label, $_ := .labels }}
{{- if regexMatch "^(app\\.kubernetes\\.io/(name|instance|component|version|managed-by)|helm\\.sh/chart)$" $label }}
- {{ printf "%s: %s is a label that the chart gives and selects by; take another" $.place $label | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What the API server would refuse. Takes place and resources. */}}
{{- define "arbitrage.resourceProblems" -}}
{{- $limits := default dict .resources.limits }}
{{- range $what, $asked := .resources.requests }}
{{- if hasKey $limits $what }}
{{- $limit := index $limits $what }}
{{- if gt (float64 (include "arbitrage.quantity" $asked)) (float64 (include "arbitrage.quantity" $limit)) }}
- {{ printf "%s.requests.%s: is %s, more than limits.%s, %s; lower it, or raise the limit" $.place $what (toString $asked) $what (toString $limit) | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A Kubernetes quantity as a number. */}}
{{- define "arbitrage.quantity" -}}
{{- $units := dict "m" 0.001 "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[a-zA-Z]*$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (index $units $unit) -}}
{{- end -}}

{{- define "arbitrage.modelProblems" -}}
{{- $c := .c -}}
{{- $name := $c.name -}}
{{- $cache := $c.modelCache -}}
{{- $engine := $c.engine -}}
{{- if and (not $c.model.reference) $c.isDeployed }}
- {{ printf "%s.model.reference: is empty; name a folder, org/name@revision, a .gguf file, or a pack such as tiny" $name | quote }}
{{- end }}
{{- if and $c.isDeployed .isPlural (has $cache.mode (list "pvc" "existingClaim")) (has $cache.accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) }}
- {{ printf "%s.modelCache.accessMode: is %s, and there may be several replicas, of which only those on one node could mount it; take ReadWriteMany, or mode emptyDir" $name $cache.accessMode | quote }}
{{- end }}
{{- $isOneNodes := and (has $cache.mode (list "pvc" "existingClaim")) (has $cache.accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) }}
{{- if and $c.isDeployed $isOneNodes (ne (toString $c.strategy.maxSurge) "0") (eq $c.kind "Deployment") }}
- {{ printf "%s.strategy.maxSurge: is %s, but modelCache.accessMode is %s, and a new pod would wait for the claim that the old one holds; set strategy to {maxSurge: 0, maxUnavailable: 1}, or take ReadWriteMany" $name (toString $c.strategy.maxSurge) $cache.accessMode | quote }}
{{- end }}
{{- if and $cache.pull $isOneNodes }}
- {{ printf "%s.modelCache.pull: is %s, but a claim that is %s is one node's, and the job and the pods may be on two; take ReadWriteMany, or mode emptyDir" $name $cache.pull $cache.accessMode | quote }}
{{- end }}
{{- if and (eq $engine.mode "external") (gt (int $c.gpu.count) 0) }}
- {{ printf "%s.gpu.count: is %d, but engine.mode is external, so nothing here would use them; set it to 0" $name (int $c.gpu.count) | quote }}
{{- end }}
{{- if and (eq $engine.mode "inProcess") (gt (int $c.gpu.count) 1) }}
- {{ printf "%s.gpu.count: is %d, but in the process a model is on one GPU; set it to 1, or run the model with engine.mode sidecar" $name (int $c.gpu.count) | quote }}
{{- end }}
{{- if and (eq $cache.mode "existingClaim") (not $cache.existingClaim) }}
- {{ printf "%s.modelCache.existingClaim: is empty, but mode is existingClaim; name the claim" $name | quote }}
{{- end }}
{{- if and $cache.existingClaim (ne $cache.mode "existingClaim") }}
- {{ printf "%s.modelCache.existingClaim: is %s, but mode is %s, so it is not used; set modelCache.mode=existingClaim" $name $cache.existingClaim $cache.mode | quote }}
{{- end }}
{{- if and (eq $cache.mode "pvc") (eq $cache.accessMode "ReadOnlyMany") }}
- {{ printf "%s.modelCache.accessMode: is ReadOnlyMany, but a new claim is empty, and nobody could fill it; take ReadWriteMany, or an existingClaim that is full" $name | quote }}
{{- end }}
{{- if and (ne $cache.mode "none") (has $cache.mountPath (list "/tmp" "/dev/shm" "/proc" "/dev" "/opt/arbitrage")) }}
- {{ printf "%s.modelCache.mountPath: is %s, where something else is; take another, such as /models" $name $cache.mountPath | quote }}
{{- end }}
{{- if and $cache.pull (eq $cache.mode "none") }}
- {{ printf "%s.modelCache.pull: is %s, but there is nowhere to put it; set modelCache.mode to emptyDir, pvc or existingClaim" $name $cache.pull | quote }}
{{- end }}
{{- if and $cache.pull (eq $cache.accessMode "ReadOnlyMany") (ne $cache.mode "emptyDir") }}
- {{ printf "%s.modelCache.pull: is %s, but a claim that is ReadOnlyMany cannot be written to; take ReadWriteMany" $name $cache.pull | quote }}
{{- end }}
{{- if has $name (list "prm" "router") }}
{{- if has $engine.mode (list "sidecar" "kserve") }}
- {{ printf "%s.engine.mode: is %s, which is for draft and target; set it to inProcess or external" $name $engine.mode | quote }}
{{- end }}
{{- $kinds := ternary (list "oip" "vllm") (list "oip") (eq $name "prm") }}
{{- if and (eq $engine.mode "external") (not (has $engine.kind $kinds)) }}
- {{ printf "%s.engine.kind: is %s, which gives no scores; set it to %s" $name $engine.kind (join " or " $kinds) | quote }}
{{- end }}
{{- if and (eq $name "prm") (eq $engine.mode "external") (eq $engine.kind "vllm") (not $engine.tokenizer) }}
- "prm.engine.tokenizer: is empty, but engine.kind is vllm, which is asked with token ids; name the model's own tokenizer"
{{- end }}
{{- if and (eq $name "router") (eq $engine.mode "external") (not $engine.routerJson) }}
- "router.engine.routerJson: is empty, but engine.mode is external; name a ConfigMap with the router.json of its checkpoint, which says what its scores mean"
{{- end }}
{{- else if eq $engine.kind "oip" }}
- {{ printf "%s.engine.kind: is oip, which does not write; take vllm, sglang, tgi or openai" $name | quote }}
{{- end }}
{{- if and (ne (int $c.service.kservePort) 0) (has $name (list "draft" "target")) }}
- {{ printf "%s.service.kservePort: is set, but only prm and router speak KServe's protocol; set it to 0" $name | quote }}
{{- end }}
{{- if has (int $c.service.kservePort) (list (int $c.service.port) (int $c.service.metricsPort)) }}
- {{ printf "%s.service.kservePort: is %d as service.port or service.metricsPort is; give it another" $name (int $c.service.kservePort) | quote }}
{{- end }}
{{- if and (ne (int $c.service.kservePort) 0) .root.Values.tls.enabled .root.Values.tls.mutual }}
- {{ printf "%s.service.kservePort: is set, but tls.mutual lets only the orchestrator in, and that port asks nobody who they are; set it to 0, or tls.mutual=false" $name | quote }}
{{- end }}
{{- if and (eq $engine.mode "external") (not $engine.url) }}
- {{ printf "%s.engine.url: is empty, but engine.mode is external; give the server's URL, such as http://vllm:8000" $name | quote }}
{{- end }}
{{- if and (eq $engine.mode "external") $engine.url (ne $engine.kind "oip") (not (hasPrefix "http" $engine.url)) }}
- {{ printf "%s.engine.url: is %s, without http:// or https://; put it before" $name $engine.url | quote }}
{{- end }}
{{- if and $engine.url (ne $engine.mode "external") }}
- {{ printf "%s.engine.url: is %s, but engine.mode is %s, so it is not used; set engine.mode=external" $name $engine.url $engine.mode | quote }}
{{- end }}
{{- if and (eq $engine.mode "sidecar") (not $engine.image) }}
- {{ printf "%s.engine.image: is empty, but engine.mode is sidecar; name the server's image with a tag, such as docker.io/vllm/vllm-openai:v0.11.0" $name | quote }}
{{- end }}
{{- if and (eq $engine.mode "sidecar") (eq $engine.kind "openai") }}
- {{ printf "%s.engine.kind: is openai, which is no server that can be started; take vllm, sglang or tgi, or engine.mode external" $name | quote }}
{{- end }}
{{- if and (eq $engine.mode "sidecar") (has (int $engine.port) (list (int $c.service.port) (int $c.service.metricsPort))) }}
- {{ printf "%s.engine.port: is %d, which the generator listens on itself; give another" $name (int $engine.port) | quote }}
{{- end }}
{{- if and $c.isDeployed (has $engine.mode (list "sidecar" "kserve")) }}
{{- include "arbitrage.resourceProblems" (dict "place" (printf "%s.engine.resources" $name) "resources" $engine.resources) }}
{{- $own := list "HOME" "USER" }}
{{- if eq $engine.mode "sidecar" }}
{{- $own = append $own "XDG_CACHE_HOME" }}
{{- range fromYamlArray (include "arbitrage.engineCacheEnvironment" $c) }}{{ $own = append $own .name }}{{ end }}
{{- end }}
{{- range $entry := $engine.env }}
{{- if has $entry.name $own }}
- {{ printf "%s.engine.env: %s is given by the chart already, and would be there twice; leave it out" $name $entry.name | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $engine.mode "kserve") (not $engine.storageUri) }}
- {{ printf "%s.engine.storageUri: is empty, but engine.mode is kserve; say where KServe gets the model, such as hf://org/name" $name | quote }}
{{- end }}
{{- if and (ne $engine.mode "inProcess") (eq $engine.prompt "chat") (not $engine.tokenizer) }}
- {{ printf "%s.engine.tokenizer: is empty, but engine.prompt is chat, whose template it has; name the model's own tokenizer" $name | quote }}
{{- end }}
{{- if and (ne $engine.mode "inProcess") (eq $c.kind "InferenceService") }}
- {{ printf "%s.kind: is InferenceService, but engine.mode is %s; take kind Deployment for a generator whose model runs elsewhere" $name $engine.mode | quote }}
{{- end }}
{{- end -}}

{{- define "arbitrage.releaseProblems" -}}
{{- $values := .root.Values -}}
{{- $tls := $values.tls -}}
{{- $training := $values.routerTraining -}}
{{- $fullname := include "arbitrage.fullname" .root }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname) }}
- {{ printf "fullnameOverride: objects would be called %q, which no Service may be; give one that begins with a letter and has only small letters, digits and -" $fullname | quote }}
{{- end }}
{{- include "arbitrage.labelProblems" (dict "place" "commonLabels" "labels" $values.commonLabels) }}
{{- range $kind := list "serviceMonitor" "podMonitor" "prometheusRule" "dashboard" }}
{{- include "arbitrage.labelProblems" (dict "place" (printf "metrics.%s.labels" $kind) "labels" (index $values.metrics $kind).labels) }}
{{- end }}
{{- if and $tls.certManager.enabled (not $tls.enabled) }}
- "tls.certManager.enabled: is true, but tls.enabled is false, so nothing would use the certificates; set tls.enabled=true"
{{- end }}
{{- range $name, $secret := $tls.secrets }}
{{- if and $secret (not $tls.enabled) }}
- {{ printf "tls.secrets.%s: is %s, but tls.enabled is false, so everything is in plaintext; set tls.enabled=true" $name $secret | quote }}
{{- else if and $secret $tls.certManager.enabled }}
- {{ printf "tls.secrets.%s: is %s, but tls.certManager.enabled is true and makes one of its own; leave one of them out" $name $secret | quote }}
{{- end }}
{{- end }}
{{- if and $tls.enabled $tls.certManager.enabled (not $tls.certManager.issuerRef.name) }}
- "tls.certManager.issuerRef.name: is empty; name the issuer that signs the certificates"
{{- end }}
{{- if and (eq $values.redis.mode "external") (not $values.redis.external.url) (not $values.redis.external.urlSecret.name) }}
- "redis.external.url: is empty, but redis.mode is external; give it, or redis.external.urlSecret.name"
{{- end }}
{{- if and $values.redis.external.url $values.redis.external.urlSecret.name }}
- "redis.external.url: is given, and so is redis.external.urlSecret.name; give one of them"
{{- end }}
{{- if regexMatch "//[^/]*:[^/]*@" $values.redis.external.url }}
- "redis.external.url: holds a password, which everyone could read who may list pods; put the URL into a Secret and name it in redis.external.urlSecret.name"
{{- end }}
{{- if and $values.redis.external.url (ne $values.redis.mode "external") }}
- {{ printf "redis.external.url: is given, but redis.mode is %s, so it is not used; set redis.mode=external" $values.redis.mode | quote }}
{{- end }}
{{- if and $values.redis.external.urlSecret.name (ne $values.redis.mode "external") }}
- {{ printf "redis.external.urlSecret.name: is %s, but redis.mode is %s, so it is not used; set redis.mode=external" $values.redis.external.urlSecret.name $values.redis.mode | quote }}
{{- end }}
{{- $external := $values.redis.external }}
{{- $ports := list }}
{{- range $external.ports }}{{ $ports = append $ports (toString (int .)) }}{{ end }}
{{- if and $external.url $values.networkPolicy.enabled }}
{{- range splitList "," (regexReplaceAll "^[a-z+]+://([^/?]*@)?([^/?]*).*$" $external.url "${2}") }}
{{- $port := default "6379" (trimPrefix ":" (regexFind ":[0-9]+$" .)) }}
{{- if not (has $port $ports) }}
- {{ printf "redis.external.ports: lacks %s, on which redis.external.url asks %s, so the NetworkPolicy would not let it out; add it" $port . | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if eq $values.redis.mode "bundled" }}
{{- with $values.redis.bundled }}
{{- include "arbitrage.resourceProblems" (dict "place" "redis.bundled.resources" "resources" .resources) }}
{{- $memory := dig "limits" "memory" "" .resources }}
{{- $needed := divf (mulf (float64 .maxMemoryMib) 4.0 1048576.0) 3.0 }}
{{- if and $memory (lt (float64 (include "arbitrage.quantity" $memory)) $needed) }}
- {{ printf "redis.bundled.resources.limits.memory: is %s, and Redis would be killed before its %d MiB of data are full; raise it to at least %dMi, or lower maxMemoryMib" (toString $memory) (int .maxMemoryMib) (int (ceil (divf $needed 1048576.0))) | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- $orchestrator := .components.orchestrator }}
{{- $rate := dig "FEEDBACK_SAMPLE_RATE" 0.0 $orchestrator.settings }}
{{- if and $orchestrator.isDeployed (gt (float64 $rate) 0.0) }}
{{- range $name := list "prm" "router" }}
{{- if not (index $.components $name).reach }}
- {{ printf "orchestrator.settings.FEEDBACK_SAMPLE_RATE: is %s, but %s.enabled is false, and feedback is what both say of a step; set it to 0, or %s.enabled=true" (toString $rate) $name $name | quote }}
{{- end }}
{{- end }}
{{- if and (eq $values.redis.mode "none") (not $orchestrator.settings.FEEDBACK_FOLDER) }}
- {{ printf "orchestrator.settings.FEEDBACK_SAMPLE_RATE: is %s, but redis.mode is none, so it has nowhere to go; set redis.mode, or orchestrator.settings.FEEDBACK_FOLDER" (toString $rate) | quote }}
{{- end }}
{{- end }}
{{- if and $values.ingress.enabled (not $values.ingress.host) (not $values.ingress.httpHost) }}
- "ingress.host: is empty, but ingress.enabled is true; give the name under which clients call, or ingress.httpHost for those of the OpenAI API"
{{- end }}
{{- $gateway := .components.gateway }}
{{- if and $values.ingress.httpHost (not $values.ingress.enabled) }}
- {{ printf "ingress.httpHost: is %q, but ingress.enabled is false; set ingress.enabled=true" $values.ingress.httpHost | quote }}
{{- end }}
{{- if and $values.ingress.httpTlsSecret (not $values.ingress.httpHost) }}
- {{ printf "ingress.httpTlsSecret: is %s, but there is no ingress.httpHost that it would be for; give that, or leave it out" $values.ingress.httpTlsSecret | quote }}
{{- end }}
{{- if and $values.ingress.httpHost (not $gateway.isDeployed) }}
- {{ printf "ingress.httpHost: is %q, but gateway.enabled is false, and nobody would answer; set gateway.enabled=true" $values.ingress.httpHost | quote }}
{{- end }}
{{- if and $values.ingress.httpHost (eq $values.ingress.httpHost $values.ingress.host) }}
- {{ printf "ingress.httpHost: is %q as ingress.host is, and a controller speaks either gRPC or HTTP under a name; give another" $values.ingress.host | quote }}
{{- end }}
{{- if and $values.gatewayApi.httpHostnames (not $gateway.isDeployed) }}
- "gatewayApi.httpHostnames: are given, but gateway.enabled is false, and nobody would answer; set gateway.enabled=true"
{{- end }}
{{- range $name := $values.gatewayApi.httpHostnames }}
{{- range $other := $values.gatewayApi.hostnames }}
{{- /* *.a.b stands for all below a.b. */}}
{{- if or (eq $name $other) (and (hasPrefix "*" $other) (hasSuffix (trimPrefix "*" $other) $name)) (and (hasPrefix "*" $name) (hasSuffix (trimPrefix "*" $name) $other)) }}
- {{ printf "gatewayApi.httpHostnames: %s and gatewayApi.hostnames' %s have names in common, which would belong to routes of both kinds, and a gateway drops one of them; give names that are apart" $name $other | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $values.gatewayApi.backendCa (not (and $values.gatewayApi.enabled $tls.enabled)) }}
- {{ printf "gatewayApi.backendCa: is %s, but gatewayApi.enabled or tls.enabled is false, so no gateway speaks TLS with the services; set both to true, or leave it out" $values.gatewayApi.backendCa | quote }}
{{- end }}
{{- if and $values.gatewayApi.enabled (not $values.gatewayApi.parentRefs) }}
- "gatewayApi.parentRefs: is empty, but gatewayApi.enabled is true; name the gateway"
{{- end }}
{{- if and $values.metrics.serviceMonitor.enabled $values.metrics.podMonitor.enabled }}
- "metrics.podMonitor.enabled: is true, and so is metrics.serviceMonitor.enabled; every pod would be counted twice, by autoscalers too; set one of them to false"
{{- end }}
{{- if $training.enabled }}
{{- if not $training.config }}
- "routerTraining.config: is empty; give a router_training configuration (TOML) without [services], [promote] and work"
{{- end }}
{{- if regexMatch "(?m)^\\s*(\\[services\\]|\\[promote\\]|work\\s*=)" $training.config }}
- "routerTraining.config: has [services], [promote] or work, which the chart gives; take them out"
{{- end }}
{{- include "arbitrage.resourceProblems" (dict "place" "routerTraining.collect.resources" "resources" $training.collect.resources) }}
{{- include "arbitrage.resourceProblems" (dict "place" "routerTraining.train.resources" "resources" $training.train.resources) }}
{{- if not .components.prm.reach }}
- "routerTraining.enabled: is true, but prm.enabled is false, and without a PRM there are no advantages to learn; set prm.enabled=true"
{{- end }}
{{- if and $tls.enabled (not $tls.certManager.enabled) (not (index $tls.secrets "router-training")) }}
- "tls.secrets.router-training: is empty, but tls.enabled is true; name the Secret with tls.crt, tls.key and ca.crt of the training job, or set tls.certManager.enabled=true"
{{- end }}
{{- if and (not $training.store.existingClaim) (ne $training.store.accessMode "ReadWriteMany") (gt (int $training.collect.shards) 1) }}
- {{ printf "routerTraining.store.accessMode: is %s, but %d shards write to it at once; take ReadWriteMany, or set routerTraining.collect.shards=1" $training.store.accessMode (int $training.collect.shards) | quote }}
{{- end }}
{{- if and (not $training.store.existingClaim) (eq $training.store.accessMode "ReadOnlyMany") }}
- "routerTraining.store.accessMode: is ReadOnlyMany, but its jobs write there; take ReadWriteMany"
{{- end }}
{{- if and (not $training.store.existingClaim) (hasPrefix "ReadWriteOnce" $training.store.accessMode) .components.router.isDeployed (include "arbitrage.readsStore" (dict "root" .root "c" .components.router)) }}
- {{ printf "routerTraining.store.accessMode: is %s, but the router reads it too, perhaps on another node; take ReadWriteMany, promote to a bucket, or, where there is one node, name a claim of your own in store.existingClaim" $training.store.accessMode | quote }}
{{- end }}
{{- $own := list "HOME" "HF_HOME" }}
{{- if $training.train.fromFeedback }}
{{- range fromYamlArray (include "arbitrage.storeEnv" .root) }}{{ $own = append $own .name }}{{ end }}
{{- end }}
{{- range $entry := $training.extraEnv }}
{{- if has $entry.name $own }}
- {{ printf "routerTraining.extraEnv: %s is given by the chart already, and would be there twice; leave it out" $entry.name | quote }}
{{- end }}
{{- end }}
{{- if and $training.train.fromFeedback (eq $values.redis.mode "none") }}
- "routerTraining.train.fromFeedback: is true, but redis.mode is none, and the feedback lies in Redis; set redis.mode to bundled or external"
{{- end }}
{{- end }}
{{- range $values.extraObjects }}
{{- $object := ternary (dict) . (kindIs "string" .) }}
{{- if has $object.kind (list "HorizontalPodAutoscaler" "ScaledObject") }}
{{- $scaled := dig "spec" "scaleTargetRef" "name" "" $object }}
{{- range $name, $c := $.components }}
{{- if and (ne $c.autoscaling.mode "none") (eq $scaled (printf "%s-%s" (include "arbitrage.fullname" $.root) $name)) }}
- {{ printf "extraObjects: the %s of %s would be a second autoscaler beside %s.autoscaling.mode %s, and both would fight; drop it, or set the mode to none" $object.kind $scaled $name $c.autoscaling.mode | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $values.tests.enabled $values.auth.keysSecret (not $values.tests.apiKeySecret.name) }}
- "tests.apiKeySecret.name: is empty, but auth.keysSecret asks callers for a key; name a Secret with a key, or set tests.enabled=false"
{{- end }}
{{- end -}}
