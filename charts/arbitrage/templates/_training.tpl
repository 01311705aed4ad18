{{/* The pods of retraining. Takes root, and redisCa: the Secret with the CA of a Redis that is read. */}}

{{- define "arbitrage.trainingPod" -}}
{{- $redisCa := .redisCa -}}
{{- with .root }}
{{- $training := .Values.routerTraining -}}
{{ include "arbitrage.podCommon" (dict "root" . "security" $training.security) }}
serviceAccountName: {{ include "arbitrage.fullname" . }}-router-training
restartPolicy: Never
{{ include "arbitrage.scheduling" (dict "scheduling" $training.scheduling "selector" (include "arbitrage.selector" (dict "root" . "name" "router-training"))) }}
volumes:
  - { name: tmp, emptyDir: {} }
  - { name: configuration, configMap: { name: {{ include "arbitrage.fullname" . }}-router-training } }
  - { name: store, persistentVolumeClaim: { claimName: {{ include "arbitrage.storeClaim" . }} } }
  {{- if .Values.tls.enabled }}
  - { name: tls, secret: { secretName: {{ include "arbitrage.tlsSecret" (dict "root" . "name" "router-training") }} } }
  {{- end }}
  {{- with $redisCa }}
  - { name: redis-ca, secret: { secretName: {{ . }} } }
  {{- end }}
{{- end }}
{{- end -}}

{{/* One stage. Takes root, arguments, resources, environment and redisCa. */}}
{{- define "arbitrage.trainingContainer" -}}
{{- $training := .root.Values.routerTraining -}}
image: {{ include "arbitrage.image" (dict "root" .root "image" $training.image "default" "training") }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [python, -m, router_training]
args:
  {{- range .arguments }}
  - {{ . | quote }}
  {{- end }}
  - --config=/etc/router-training/router.toml
env:
  - { name: HOME, value: /tmp }
  - { name: HF_HOME, value: /store/hub }
  {{- with .environment }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $training.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $training.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- .resources | nindent 2 }}
securityContext:
  {{- include "arbitrage.containerSecurity" . | nindent 2 }}
volumeMounts:
  - { name: tmp, mountPath: /tmp }
  - { name: configuration, mountPath: /etc/router-training, readOnly: true }
  - { name: store, mountPath: /store }
  {{- if .root.Values.tls.enabled }}
  - { name: tls, mountPath: /etc/arbitrage-tls, readOnly: true }
  {{- end }}
  {{- if .redisCa }}
  # Where the URL says it is, as in the orchestrator.
  - { name: redis-ca, mountPath: /etc/arbitrage/redis, readOnly: true }
  {{- end }}
{{- end -}}
