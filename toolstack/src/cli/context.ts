import type { Configuration } from 'vtpm-common';
import type { ManagerApi } from './manager-api.js';
import type { Output } from './output.js';
import type { SupervisorApi } from './supervisor-api.js';

/** What every command works with. */
export interface Context {
  readonly configuration: Configuration;
  readonly output: Output;
  readonly manager: ManagerApi;
  readonly supervisor: SupervisorApi;
}
