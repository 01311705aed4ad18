{{/* The pods: what is the same for every one of them, and that of a component. */}}

{{/* Security of a pod for the `restricted` profile. Takes a `security` block. */}}
{{- define "arbitrage.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .runAsUser }}
runAsGroup: {{ int64 .runAsGroup }}
fsGroup: {{ int64 .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{/* And of a container. */}}
{{- define "arbitrage.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/* Where a pod goes. Takes scheduling and selector. */}}
{{- define "arbitrage.scheduling" -}}
topologySpreadConstraints:
{{- if .scheduling.topologySpreadConstraints }}
  {{- toYaml .scheduling.topologySpreadConstraints | nindent 2 }}
{{- else }}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
{{- end }}
{{- end }}
{{- with .scheduling.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .scheduling.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .scheduling.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .scheduling.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .scheduling.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Resources with GPUs on top. Takes resources and gpu. */}}
{{- define "arbitrage.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpu.count) 0 -}}
{{- $limits := merge (dict .gpu.resource (int .gpu.count)) (default dict $resources.limits) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{ toYaml $resources }}
{{- end -}}

{{/* What every pod of the chart says. Takes root and security. */}}
{{- define "arbitrage.podCommon" -}}
automountServiceAccountToken: false
# A Service called arbitrage-draft would become ARBITRAGE_DRAFT_PORT, a setting nobody knows.
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "arbitrage.podSecurity" .security | nindent 2 }}
{{- end -}}

{{/* The pod of a component. Takes root, c, components, and container: the name of its container. */}}
{{- define "arbitrage.podSpec" -}}
{{- $root := .root -}}
{{- $c := .c -}}
{{- $isSidecar := and $c.isModel (eq $c.engine.mode "sidecar") -}}
{{ include "arbitrage.podCommon" (dict "root" $root "security" $c.security) }}
serviceAccountName: {{ include "arbitrage.fullname" $root }}-{{ $c.name }}
terminationGracePeriodSeconds: {{ $c.drain.terminationGracePeriodSeconds }}
{{ include "arbitrage.scheduling" (dict "scheduling" $c.scheduling "selector" (include "arbitrage.selector" (dict "root" $root "name" $c.name))) }}
{{- if or $isSidecar $c.extraInitContainers $c.modelCache.pull }}
initContainers:
  {{- if $c.modelCache.pull }}
  {{- include "arbitrage.packContainer" . | nindent 2 }}
  {{- end }}
  {{- with $c.extraInitContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if $isSidecar }}
  {{- include "arbitrage.engineContainer" . | nindent 2 }}
  {{- end }}
{{- end }}
containers:
  - name: {{ default $c.name .container }}
    image: {{ include "arbitrage.image" (dict "root" $root "image" $c.image "default" $c.program.image) }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [python, -m, {{ $c.program.module }}]
    env:
      {{- include "arbitrage.environment" . | nindent 6 }}
    {{- with $c.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      {{- with int $c.service.kservePort }}
      # The first, because that is KServe's.
      - { name: kserve, containerPort: {{ . }} }
      {{- end }}
      - { name: {{ ternary "http" "grpc" $c.isHttp }}, containerPort: {{ $c.service.port }} }
      - { name: metrics, containerPort: {{ $c.service.metricsPort }} }
    {{- include "arbitrage.probes" . | nindent 4 }}
    lifecycle:
      preStop: { sleep: { seconds: {{ $c.drain.preStopSeconds }} } }
    resources:
      {{- if and $c.isModel (ne $c.engine.mode "inProcess") }}
      {{- toYaml $c.resources | nindent 6 }}
      {{- else }}
      {{- include "arbitrage.resources" (dict "resources" $c.resources "gpu" $c.gpu) | nindent 6 }}
      {{- end }}
    securityContext:
      {{- include "arbitrage.containerSecurity" . | nindent 6 }}
    volumeMounts:
      {{- include "arbitrage.mounts" . | nindent 6 }}
  {{- with $c.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  {{- include "arbitrage.volumes" . | nindent 2 }}
{{- end -}}

{{/* Probes of a component's program. A kubelet's gRPC probe knows no TLS; /ready asks no certificate. */}}
{{- define "arbitrage.probes" -}}
{{- $c := .c -}}
{{- $isByGrpc := not (or .root.Values.tls.enabled $c.isHttp) -}}
{{- range $probe := list "startup" "readiness" "liveness" }}
{{ $probe }}Probe:
  {{- if $isByGrpc }}
  grpc: { port: {{ $c.service.port }}, service: {{ $c.program.health }} }
  {{- else if eq $probe "liveness" }}
  httpGet: { port: metrics, path: /live }
  {{- else }}
  httpGet: { port: metrics, path: /ready }
  {{- end }}
  {{- toYaml (index $c.probes $probe) | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "arbitrage.mounts" -}}
{{- $c := .c -}}
{{- $values := .root.Values -}}
- { name: tmp, mountPath: /tmp }
{{- if $values.tls.enabled }}
- { name: tls, mountPath: /etc/arbitrage/tls, readOnly: true }
{{- end }}
{{- if $c.isModel }}
{{- if ne $c.modelCache.mode "none" }}
- { name: models, mountPath: {{ $c.modelCache.mountPath }} }
{{- end }}
{{- if $c.engine.apiKeySecret.name }}
- { name: engine-key, mountPath: /etc/arbitrage/engine-key, readOnly: true }
{{- end }}
{{- if $c.engine.routerJson }}
- { name: router-json, mountPath: /etc/arbitrage/router, readOnly: true }
{{- end }}
{{- if $c.engine.caSecret.name }}
- { name: engine-ca, mountPath: /etc/arbitrage/engine-ca, readOnly: true }
{{- end }}
{{- else if not $c.isHttp }}
{{- if $values.auth.keysSecret }}
- { name: keys, mountPath: /etc/arbitrage/keys, readOnly: true }
{{- end }}
{{- if and (eq $values.redis.mode "external") $values.redis.external.caSecret }}
- { name: redis-ca, mountPath: /etc/arbitrage/redis, readOnly: true }
{{- end }}
{{- end }}
{{- if include "arbitrage.readsStore" . }}
- { name: store, mountPath: /store, readOnly: true }
{{- end }}
{{- with $c.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "arbitrage.volumes" -}}
{{- $c := .c -}}
{{- $values := .root.Values -}}
- { name: tmp, emptyDir: {} }
{{- if $values.tls.enabled }}
- { name: tls, secret: { secretName: {{ include "arbitrage.tlsSecret" (dict "root" .root "name" $c.name) }} } }
{{- end }}
{{- if $c.isModel }}
{{- if ne $c.modelCache.mode "none" }}
- name: models
  {{- include "arbitrage.cacheVolume" . | nindent 2 }}
{{- end }}
{{- with $c.engine.apiKeySecret.name }}
- { name: engine-key, secret: { secretName: {{ . }} } }
{{- end }}
{{- with $c.engine.routerJson }}
- { name: router-json, configMap: { name: {{ . }} } }
{{- end }}
{{- with $c.engine.caSecret.name }}
- { name: engine-ca, secret: { secretName: {{ . }} } }
{{- end }}
{{- if eq $c.engine.mode "sidecar" }}
- { name: engine-tmp, emptyDir: {} }
- { name: shared-memory, emptyDir: { medium: Memory, sizeLimit: {{ $c.engine.sharedMemory }} } }
{{- end }}
{{- else if not $c.isHttp }}
{{- with $values.auth.keysSecret }}
- { name: keys, secret: { secretName: {{ . }} } }
{{- end }}
{{- if and (eq $values.redis.mode "external") $values.redis.external.caSecret }}
- { name: redis-ca, secret: { secretName: {{ $values.redis.external.caSecret }} } }
{{- end }}
{{- end }}
{{- if include "arbitrage.readsStore" . }}
- name: store
  persistentVolumeClaim: { claimName: {{ include "arbitrage.storeClaim" .root }}, readOnly: true }
{{- end }}
{{- with $c.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Says so where the router reads what retraining promotes. */}}
{{- define "arbitrage.readsStore" -}}
{{- $training := .root.Values.routerTraining -}}
{{- if and (eq .c.name "router") $training.enabled (eq .c.model.reference $training.promoteTo) (hasPrefix "/store" $training.promoteTo) }}true{{ end }}
{{- end -}}

{{- define "arbitrage.storeClaim" -}}
{{- default (printf "%s-router-training" (include "arbitrage.fullname" .)) .Values.routerTraining.store.existingClaim -}}
{{- end -}}

{{- define "arbitrage.cacheVolume" -}}
{{- $cache := .c.modelCache -}}
{{- if eq $cache.mode "emptyDir" -}}
emptyDir: { sizeLimit: {{ $cache.size }} }
{{- else -}}
persistentVolumeClaim:
  claimName: {{ ternary $cache.existingClaim (printf "%s-%s-models" (include "arbitrage.fullname" .root) .c.name) (eq $cache.mode "existingClaim") }}
  {{- if eq $cache.accessMode "ReadOnlyMany" }}
  # Drivers attach such a volume to several nodes only if each pod says so.
  readOnly: true
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Lets a pod begin only once its pack is whole: fetched here, or by the job. */}}
{{- define "arbitrage.packContainer" -}}
{{- $c := .c -}}
{{- $isOwn := eq $c.modelCache.mode "emptyDir" -}}
- name: pack
  image: {{ include "arbitrage.image" (dict "root" .root "image" $c.image "default" $c.program.image) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [arbitrage, models, {{ ternary "pull" "verify" $isOwn }}, {{ $c.modelCache.pull }}]
  {{- if and $isOwn $c.modelCache.mirror }}
  args: [--from, {{ $c.modelCache.mirror | quote }}]
  {{- end }}
  env:
    - { name: HOME, value: /tmp }
    {{- include "arbitrage.cacheEnvironment" $c | nindent 4 }}
  resources:
    {{- toYaml $c.resources | nindent 4 }}
  securityContext:
    {{- include "arbitrage.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - { name: tmp, mountPath: /tmp }
    - { name: models, mountPath: {{ $c.modelCache.mountPath }} }
{{- end -}}

{{/* The pod of the job that fetches a pack into a claim. Takes root and c. */}}
{{- define "arbitrage.pullPod" -}}
{{- $root := .root -}}
{{- $c := .c -}}
{{- $who := dict "root" $root "name" (printf "%s-models" $c.name) -}}
metadata:
  labels:
    {{- include "arbitrage.podLabels" $who | nindent 4 }}
spec:
  {{- include "arbitrage.podCommon" (dict "root" $root "security" $c.security) | nindent 2 }}
  serviceAccountName: {{ include "arbitrage.fullname" $root }}-{{ $c.name }}
  restartPolicy: OnFailure
  {{- include "arbitrage.scheduling" (dict "scheduling" $c.scheduling "selector" (include "arbitrage.selector" $who)) | nindent 2 }}
  containers:
    - name: pull
      image: {{ include "arbitrage.image" (dict "root" $root "image" $c.image "default" $c.program.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [arbitrage, models, pull, {{ $c.modelCache.pull }}]
      {{- with $c.modelCache.mirror }}
      args: [--from, {{ . | quote }}]
      {{- end }}
      env:
        - { name: HOME, value: /tmp }
        {{- include "arbitrage.cacheEnvironment" $c | nindent 8 }}
      resources:
        {{- toYaml $c.resources | nindent 8 }}
      securityContext:
        {{- include "arbitrage.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - { name: tmp, mountPath: /tmp }
        - { name: models, mountPath: {{ $c.modelCache.mountPath }} }
  volumes:
    - { name: tmp, emptyDir: {} }
    - name: models
      {{- include "arbitrage.cacheVolume" . | nindent 6 }}
{{- end -}}

{{/* The server beside a generator: it starts before, and ends after it. */}}
{{- define "arbitrage.engineContainer" -}}
{{- $c := .c -}}
{{- $engine := $c.engine -}}
{{- $model := regexReplaceAll "@.*$" $c.model.reference "" -}}
{{- $revision := regexFind "[^@]*$" (ternary $c.model.reference "" (contains "@" $c.model.reference)) -}}
- name: engine
  image: {{ $engine.image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  restartPolicy: Always
  {{- if eq $engine.kind "vllm" }}
  command: [vllm, serve, {{ $model | quote }}]
  args: [--host, "0.0.0.0", --port, {{ $engine.port | quote }}, --served-model-name, {{ $model | quote }}
  {{- else if eq $engine.kind "sglang" }}
  command: [python3, -m, sglang.launch_server, --model-path, {{ $model | quote }}]
  args: [--host, "0.0.0.0", --port, {{ $engine.port | quote }}, --served-model-name, {{ $model | quote }}
  {{- else }}
  command: [text-generation-launcher, --model-id, {{ $model | quote }}]
  args: [--hostname, "0.0.0.0", --port, {{ $engine.port | quote }}
  {{- end }}
  {{- with $revision }}, --revision, {{ . | quote }}{{ end }}
  {{- range $engine.args }}, {{ . | quote }}{{ end }}]
  env:
    - { name: HOME, value: /tmp }
    # The user has no entry in the image's /etc/passwd, which torch would look up.
    - { name: USER, value: arbitrage }
    - { name: XDG_CACHE_HOME, value: /tmp }
    {{- include "arbitrage.engineCacheEnvironment" $c | nindent 4 }}
    {{- with $engine.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - { name: engine, containerPort: {{ $engine.port }} }
  startupProbe:
    httpGet: { port: engine, path: /health }
    {{- toYaml $c.probes.startup | nindent 4 }}
  livenessProbe:
    httpGet: { port: engine, path: /health }
    {{- toYaml $c.probes.liveness | nindent 4 }}
  resources:
    {{- include "arbitrage.resources" (dict "resources" $engine.resources "gpu" $c.gpu) | nindent 4 }}
  securityContext:
    {{- include "arbitrage.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - { name: engine-tmp, mountPath: /tmp }
    - { name: shared-memory, mountPath: /dev/shm }
    {{- if ne $c.modelCache.mode "none" }}
    - { name: models, mountPath: {{ $c.modelCache.mountPath }} }
    {{- end }}
{{- end -}}

{{- define "arbitrage.engineCacheEnvironment" -}}
{{- if ne .modelCache.mode "none" }}
- { name: HF_HOME, value: {{ .modelCache.mountPath }}/hub }
- { name: HUGGINGFACE_HUB_CACHE, value: {{ .modelCache.mountPath }}/hub/hub }
{{- end }}
{{- with .modelCache.tokenSecret }}
- name: HF_TOKEN
  valueFrom: { secretKeyRef: { name: {{ . }}, key: HF_TOKEN } }
{{- end }}
{{- end -}}
